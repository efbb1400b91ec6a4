"""What `tink doctor` looks at: this machine, what runs on a home, and the servers that are named."""
