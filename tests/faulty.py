"""A training that something happens to: `python faulty.py EVENT NUMBER WHAT -- arguments of pcan_train`.

EVENT is `fsync`, `replace` or `start`; WHAT a signal's name, or `ENOSPC`. Before the NUMBER-th `os.fsync` or `os.replace` of this process, or NUMBER
milliseconds after the training began, the signal is sent to it, or (fsync only) the disk is full from then on. `count` only counts, into $COUNTS."""
import errno, json, os, signal, sys, threading, time

def main(event, number, what, *args):
    signal.signal(signal.SIGINT, signal.default_int_handler)     # a background job would ignore Ctrl-C
    import pcan.runs
    seen = dict(fsync=0, replace=0)
    def strike():
        if what=="ENOSPC": raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.kill(os.getpid(), getattr(signal, what)); time.sleep(5)
    def watched(name, call):
        def f(*a, **kw):
            seen[name] += 1
            if event==name and (seen[name]==int(number) or what=="ENOSPC" and seen[name]>int(number)): strike()
            return call(*a, **kw)
        return f
    for name in seen: setattr(os, name, watched(name, getattr(os, name)))
    if event=="start":
        train = pcan.runs.train
        def later(*a, **kw):
            threading.Thread(target=lambda: (time.sleep(int(number)/1e3), os.kill(os.getpid(), getattr(signal, what))), daemon=True).start()
            return train(*a, **kw)
        pcan.runs.train = later
    from pcan.cli import train as command
    began = time.monotonic()
    status = command(list(args))
    if "COUNTS" in os.environ: open(os.environ["COUNTS"], "w").write(json.dumps(seen | dict(ms=int(1e3*(time.monotonic()-began)))))
    return status

if __name__=="__main__":
    i = sys.argv.index("--")
    sys.exit(main(*sys.argv[1:i], *sys.argv[i+1:]))
