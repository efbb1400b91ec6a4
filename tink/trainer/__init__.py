"""The training server: `tink trainer`. It depends on the domain and the wire, never on the worker."""
