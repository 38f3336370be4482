"""What a run does, written down and shown: metrics, live view, resources, status and report."""
