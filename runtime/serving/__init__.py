"""An OpenAI-compatible server for one engine, on transformers' own serving handlers.

Needs the extra `serve`. A request passes `app` (HTTP), `requests` (what it may ask for), `handlers`
(transformers' own, with what they lack), `answers` (the queue before the engine) and `metrics`.
"""
