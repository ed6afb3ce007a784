"""What a teacher says of a whole corpus, kept on disk once: writing, reading and checking such stores."""
