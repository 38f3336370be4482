# The filter is in the kernel: calling it without the C library is no way round.
# ends: exit 0
import ctypes
import mmap

# mov edi, 2; mov esi, 1; xor edx, edx; mov eax, 41 (socket); syscall; ret
code = b"\xbf\x02\x00\x00\x00\xbe\x01\x00\x00\x00\x31\xd2\xb8\x29\x00\x00\x00\x0f\x05\xc3"
area = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
area.write(code)
result = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(area)))()
print("contained" if result < 0 else "ESCAPED", result)
