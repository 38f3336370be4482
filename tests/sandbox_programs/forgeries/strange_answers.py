# Nor are words that the reader does not know.
import os

for text in (
    b"null",
    b"3",
    b"{}",
    b"[]",
    b'["list"]',
    b'["list","raised",3,4]',
    b'["list","raised",["list","SkipTest"],"x"]',
    b'["list","returned",["object",0,"int"]]',
    b'["list","returned",["class",0,"f"]]',
    b"\xff\xfe",
    b'["set",["list"]]',
    b'["dict",["list"]]',
    b'["int","zz"]',
    b'["decimal","x"]',
    b'["function"]',
    b'["exec","1"]',
    b"9" * 5000,
):
    os.write(4, text + b"\n")


def f(x):
    return 0
