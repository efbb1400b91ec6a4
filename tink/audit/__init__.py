"""Questions about what happened, in the SQL that answers them."""
