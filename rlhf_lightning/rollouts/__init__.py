"""From prompts to scored responses, and the buffer that an update reads."""
