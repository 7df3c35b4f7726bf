"""The chat template that most tests use, and the sentences that their tokenizers are made from."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SENTENCES = [
    "system\nYou are a helpful assistant.",
    "user\nWhat is the capital of France?",
    "assistant\nThe capital of France is Paris.",
    "user\nHow do I reset my password?",
    "assistant\nOpen the settings, choose security and press reset.",
    'tool\n{"temperature": 21, "unit": "celsius"}',
    "Où est la gare ? Naïve café, 東京, emoji 🙂.",
]
