"""What happens to a server when one of its stages, or the link between them, is lost."""
