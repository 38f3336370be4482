# Open files are few.
# ends: exit 0
kept = []
try:
    while len(kept) < 2000:
        kept.append(open("/dev/null"))
except OSError:
    print("contained", len(kept))
if len(kept) > 64:
    print("ESCAPED")
