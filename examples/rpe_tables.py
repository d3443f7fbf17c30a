def tables(rows, k): return "\n".join(f"{r}" for r in rows)
