"""The texts that runs read: documents, prompts, windows."""
