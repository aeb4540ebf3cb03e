"""What each subcommand shows in a terminal; cli.py parses the arguments."""
