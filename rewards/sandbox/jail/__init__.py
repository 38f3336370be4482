"""What runs beside the untrusted program: builds the jail, starts the program in it, watches it, ends it.

Started as a fresh interpreter without site-packages for each execution (`launch.py`). So everything here is standard
library, little of it, since importing costs more than all else here; and modules import each other relatively: the
package is called `jail` then.
"""
