"""Clients of the servers that do the work. One transport, one client a protocol."""
