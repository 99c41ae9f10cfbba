"""Talk to an exported model in the terminal."""
def chat(model: str) -> None:
    """Talk to an exported model."""
