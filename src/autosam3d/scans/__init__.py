"""From what a user named to finished files: which model, on which runtime, one scan or a folder."""
