# So are those of the x32 variant.
# ends: exit -31
from prelude import system_call

print("ESCAPED", system_call(0x40000000 + 39))
