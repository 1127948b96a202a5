"""What recipes that train share: the loop, the processes, the run folder, the display.

``trainer`` is the loop of a worker process; ``job`` starts and watches the processes; ``reports`` is what they say,
``board`` merges it and ``display`` shows it; ``checkpoint`` is the run folder and ``metrics`` what is known of the run;
``plan`` the schedule; ``settings`` and ``options`` what a user may choose. A recipe adds its data, its model and its
report, and describes itself by a ``recipe.Recipe``.
"""
