"""What came of it: exported models answer prompts, are scored, compared and reported on."""
