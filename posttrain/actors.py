"""What Ray says of an actor's death, in words for people."""

from __future__ import annotations

import re

KINDS = {
    "TrainerActor": "a trainer",
    "RolloutWorker": "a rollout worker",
    "RolloutService": "the rollout service",
    "TeacherWorker": "a teacher",
}


def describe_death(error: Exception) -> str:
    """One line from a `ray.exceptions.RayActorError`: which kind of actor died, its process, and why if Ray knows.

    Ray's own text has a dozen lines, and the kind and the process stand in the middle of it.
    """
    text = re.sub(r"\x1b\[\d*m", "", str(error)).strip()
    name = re.search(r"class_name: (\w+)", text) or re.search(r"ray::(\w+)", text)
    kind = KINDS.get(name[1], f"the actor {name[1]}") if name else "an actor"
    process = re.search(r"\bpid[:=]\s*(\d+)", text)
    where = f" (process {process[1]})" if process else ""
    if "in its creation task" in text:
        return f"{kind}{where} could not start: {text.splitlines()[-1].strip()}"
    if "unexpectedly exits" in text:
        return f"{kind} died{where}: it was killed, by someone or for want of memory, or it crashed"
    return f"{kind} died{where}: {text.splitlines()[-1].strip()}"
