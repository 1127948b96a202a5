"""The one way to start a cluster of real processes under faults: ``chaos``, ``races`` and ``recovery`` use it.

`cluster.py` starts, kills, stops and restarts processes, `forkserver.py` forks them, `proxy.py` breaks what they say to
one another, `monitor.py` asks the coordinator what is left. (``headwater.testing`` has the simulated cluster, whose
processes are objects under a virtual clock; benches without faults start ``headwater.launch.Launcher``, as users do.)
"""
