"""What a person types: all that prints, and alone in exiting."""
