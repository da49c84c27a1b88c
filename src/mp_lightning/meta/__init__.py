"""Floor 5: how is it learned? Meta-training over tasks, and the command line around it."""
