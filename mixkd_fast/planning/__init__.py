"""What a run will need and how fast it can be, from the shapes of its models alone; imports no DeepSpeed."""
