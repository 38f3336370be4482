"""What runs inside the jails of a unit test: the answer's program in one, its examiner in the other.

The program cannot forge the verdict: it shares neither a process nor a file nor a namespace with the examiner, it never
sees what a test expects, and what it sends is read as plain data (`codec`). The verdict leaves the examiner's jail over
a pipe that the program's jail does not have.
"""
