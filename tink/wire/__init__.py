"""What crosses a process: the SDK's protocol buffers, tink-train/1 and the ready file."""
