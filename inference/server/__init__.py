"""The engine behind HTTP, as OpenAI's clients speak it.

A request goes through app.py (HTTP) -> calls.py (what it asks for) -> worker.py (the engine's thread) -> replies.py.
"""
