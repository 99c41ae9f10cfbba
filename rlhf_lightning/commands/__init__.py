"""What is not a Trainer loop, as typed functions: pipeline, export, chat."""
