"""What each stage of a run does: it makes a job from recipe and data, and has actors do it."""
