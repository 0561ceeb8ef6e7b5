"""Pipeline parallelism: schedules as data, a checker and simulator for them, and one executor that runs any."""
