"""How answers leave in time: decoding, scheduling, running, HTTP."""
