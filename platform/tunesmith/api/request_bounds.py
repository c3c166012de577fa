"""What one request may be, wherever it is looked at: at the gate, and again at the door."""

from __future__ import annotations

MAX_BODY_BYTES = 1 << 20
"""What a request may send. Orders are some hundred bytes; data goes to storage, not through the door."""

MAX_BODY_S = 30.0
"""How long a request may take to send its body, in seconds."""
