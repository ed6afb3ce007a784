"""From a task's name, files or objects to tokenised micro-batches: tasks -> loading -> tokenization -> batching."""
