"""From ideas to a verdict: runs of several experiments over several seeds, and what they show."""
