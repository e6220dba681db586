"""x"""
def table(found):
    return "\n".join(f"{f['section']} {f['fact']} " + " ".join(f"{k}={v}" for k,v in f.items() if k not in ('section','fact','gpu','torch','triton','cuda','cudnn','commit','dry','at'))[:200] for f in found)
