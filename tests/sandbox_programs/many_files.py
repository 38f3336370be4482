# There is a limit on their number.
# ends: exit 0
made = 0
try:
    while made < 5000:
        open(f"/tmp/{made}", "w").close()
        made += 1
except OSError as error:
    print(error)
print("contained" if made < 2000 else "ESCAPED", made)
