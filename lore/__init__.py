"""What surrounds the method of utils.py: files, embedding, evidence, results and their use, a subject a file."""
