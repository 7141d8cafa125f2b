-- What every installation must be able to do. The suite proper is pytest's; this is for those who have only pg_regress.
\set VERBOSITY terse
SET client_min_messages = warning;
CREATE EXTENSION pg_background CASCADE;
RESET client_min_messages;
SELECT prerequisite, status FROM pg_background_check();

-- rows of a worker
SELECT * FROM pg_background_launch_v2('SELECT i, i * i FROM generate_series(1, 3) AS i') \gset
SELECT * FROM pg_background_result_v2(:pid, :cookie) AS (i int, square int);
\set VERBOSITY sqlstate
SELECT * FROM pg_background_result_v2(:pid, :cookie) AS (i int, square int);
\set VERBOSITY terse

-- a worker's transaction is not the caller's
CREATE TABLE log (what text);
BEGIN;
SELECT state, command_tag FROM pg_background_run_v2('INSERT INTO log VALUES ($1)', params => '{kept}');
INSERT INTO log VALUES ('lost');
ROLLBACK;
SELECT * FROM log;

-- what no transaction block allows
BEGIN;
SELECT * FROM pg_background_run_query_v2('VACUUM log') AS (tag text);
COMMIT;

-- errors come out as they were raised
SELECT * FROM pg_background_launch_v2('SELECT 1 / (pg_backend_pid() * 0)') \gset
SELECT * FROM pg_background_result_v2(:pid, :cookie) AS (never int);
SELECT pg_background_launch_v2('COMMIT');

-- submitted, with progress, and cancelled
SELECT * FROM pg_background_submit_v2('SELECT pg_background_progress(50, ''half''), pg_sleep(3600)', 0, 'nap') \gset
SELECT pg_background_wait_v2_timeout(:pid, :cookie, 1);
SELECT pg_background_cancel_v2_grace(:pid, :cookie, 60000);
SELECT state, has_error, sqlstate, label FROM pg_background_outcome_v2(:pid, :cookie);

-- version 1
SELECT pg_background_launch('SELECT 6 * 7') AS pid \gset
SELECT * FROM pg_background_result(:pid) AS (answer int);

SELECT workers_launched, workers_completed, workers_failed, workers_canceled, workers_active FROM pg_background_stats_v2();
DROP EXTENSION pg_background;
