"""The service: the only asyncio."""
