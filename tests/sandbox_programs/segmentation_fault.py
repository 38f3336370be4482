# A crash is the program's own.
# ends: exit -11
import ctypes

ctypes.string_at(0)
