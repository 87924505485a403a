"""Other libraries' attention interfaces on flashtile; ``import flashtile`` loads none of them."""
