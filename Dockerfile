# PostgreSQL with pg_background, on the layout of the official image (the Debian one, not Alpine):
#
#     docker build --build-arg PG_MAJOR=17 -t postgres-pg_background .
#     docker run -e POSTGRES_PASSWORD=... postgres-pg_background
#
# Needs no setting and no restart: the image's own pg_hba.conf lets the server log in to itself over the socket.
ARG PG_MAJOR=17

FROM postgres:${PG_MAJOR} AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3-pip postgresql-plpython3-$PG_MAJOR
COPY . /usr/src/pg_background
RUN cd /usr/src/pg_background \
 && python3 build.py install --pg-config /usr/lib/postgresql/$PG_MAJOR/bin/pg_config

FROM postgres:${PG_MAJOR}
RUN apt-get update \
 && apt-get install -y --no-install-recommends postgresql-plpython3-$PG_MAJOR \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build /usr/share/postgresql/$PG_MAJOR/extension/pg_background* /usr/share/postgresql/$PG_MAJOR/extension/
COPY --from=build /usr/share/postgresql/$PG_MAJOR/pg_background /usr/share/postgresql/$PG_MAJOR/pg_background
# Runs once, in the database that the image creates at its first start.
RUN echo 'CREATE EXTENSION pg_background CASCADE;' > /docker-entrypoint-initdb.d/pg_background.sql
