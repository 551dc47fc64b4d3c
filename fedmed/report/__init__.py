"""What a run leaves for people: run folder, summary, tables, figures. Nothing heavy is imported here."""
