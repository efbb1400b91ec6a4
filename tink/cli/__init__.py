"""The `tink` command. One module per subcommand; main.py lists them."""
