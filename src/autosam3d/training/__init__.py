"""From cases and a recipe to a run folder; with a teacher, a student's."""
