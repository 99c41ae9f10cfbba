"""pipeline"""
def pipeline(output: str = "runs/quickstart") -> None:
    """Run all stages."""
