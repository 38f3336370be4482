# Neither is one without clean-up.
import os

os._exit(0)
