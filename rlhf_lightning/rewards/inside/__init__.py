"""What runs in processes of its own, apart from the trainer: the standard library, and what a verifier needs."""
