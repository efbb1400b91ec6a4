"""The worker's actors: Trio tasks with mailboxes. They perform what tink/domain decides."""
