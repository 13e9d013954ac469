"""Models that answer elsewhere: chats with endpoints that speak OpenAI's API."""
