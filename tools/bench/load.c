/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Load for benchmarks: one thread, blocking sockets, as little else as possible, so that what a
 * hook costs is not lost in the client.
 *
 *   load server PORT                     answers TCP requests and datagrams with as many bytes
 *   load connect|crr|rr|udp|udpc HOST PORT SECONDS
 *
 * connect: connect and close.  crr: connect, request, response, close.  rr: requests on one
 * connection.  udp: requests by an unconnected socket, udpc: by a connected one.  Connections end
 * by RST (linger 0), so that no TIME_WAIT uses up the ports. Prints operations and seconds.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define REQUEST 64

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static int bound(int type, uint16_t port)
{
	struct sockaddr_in6 any = { .sin6_family = AF_INET6, .sin6_port = htons(port) };
	int fd = socket(AF_INET6, type, 0), one = 1, zero = 0;

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &zero, sizeof(zero));
	if (bind(fd, (struct sockaddr *)&any, sizeof(any)))
		die("bind");
	return fd;
}

static void serve(uint16_t port)
{
	int epoll = epoll_create1(0), tcp = bound(SOCK_STREAM | SOCK_NONBLOCK, port);
	int udp = bound(SOCK_DGRAM, port);
	struct epoll_event events[256], add = { .events = EPOLLIN };
	char buffer[2048];

	listen(tcp, 4096);
	add.data.fd = tcp;
	epoll_ctl(epoll, EPOLL_CTL_ADD, tcp, &add);
	add.data.fd = udp;
	epoll_ctl(epoll, EPOLL_CTL_ADD, udp, &add);
	puts("ready");
	fflush(stdout);
	for (;;) {
		int n = epoll_wait(epoll, events, 256, -1);

		for (int i = 0; i < n; i++) {
			int fd = events[i].data.fd;

			if (fd == tcp) {
				while ((add.data.fd = accept4(tcp, NULL, NULL, 0)) >= 0)
					epoll_ctl(epoll, EPOLL_CTL_ADD, add.data.fd, &add);
			} else if (fd == udp) {
				struct sockaddr_storage from;
				socklen_t size = sizeof(from);
				ssize_t got = recvfrom(udp, buffer, sizeof(buffer), 0,
						       (struct sockaddr *)&from, &size);

				if (got > 0)
					sendto(udp, buffer, got, 0, (struct sockaddr *)&from, size);
			} else {
				ssize_t got = recv(fd, buffer, sizeof(buffer), 0);

				if (got <= 0 || send(fd, buffer, got, MSG_NOSIGNAL) != got)
					close(fd);
			}
		}
	}
}

static int connected(const struct addrinfo *to)
{
	struct linger reset = { .l_onoff = 1, .l_linger = 0 };
	int fd = socket(to->ai_family, SOCK_STREAM, 0), one = 1;

	if (fd < 0)
		die("socket");
	setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	if (connect(fd, to->ai_addr, to->ai_addrlen))
		die("connect");
	return fd;
}

static void exchange(int fd)
{
	char buffer[REQUEST] = "";

	if (send(fd, buffer, REQUEST, MSG_NOSIGNAL) != REQUEST ||
	    recv(fd, buffer, REQUEST, MSG_WAITALL) != REQUEST)
		die("exchange");
}

/* The address is NULL where the socket is connected. */
static void exchange_datagrams(int fd, const struct sockaddr *to, socklen_t to_size)
{
	char buffer[REQUEST] = "";
	struct sockaddr_storage from;
	socklen_t size = sizeof(from);

	if (sendto(fd, buffer, REQUEST, 0, to, to_size) != REQUEST ||
	    recvfrom(fd, buffer, REQUEST, 0, (struct sockaddr *)&from, &size) != REQUEST)
		die("datagram");
}

static void load(const char *mode, const char *host, const char *port, double seconds)
{
	struct addrinfo hints = { .ai_flags = AI_NUMERICHOST }, *to;
	int long_lived = -1;
	uint64_t count = 0;
	double began, end;

	if (getaddrinfo(host, port, &hints, &to))
		die("address");
	if (!strcmp(mode, "rr"))
		long_lived = connected(to);
	if (mode[0] == 'u')
		long_lived = socket(to->ai_family, SOCK_DGRAM, 0);
	if (!strcmp(mode, "udpc") && connect(long_lived, to->ai_addr, to->ai_addrlen))
		die("connect");
	began = now();
	do {
		/* The clock is not what is measured. */
		for (int i = 0; i < 64; i++, count++) {
			if (mode[0] == 'c') {
				int fd = connected(to);

				if (mode[1] == 'r')
					exchange(fd);
				close(fd);
			} else if (mode[0] == 'r') {
				exchange(long_lived);
			} else {
				exchange_datagrams(long_lived, mode[3] ? NULL : to->ai_addr,
						   mode[3] ? 0 : to->ai_addrlen);
			}
		}
		end = now();
	} while (end - began < seconds);
	printf("%llu %.6f\n", (unsigned long long)count, end - began);
	freeaddrinfo(to);
}

int main(int argc, char **argv)
{
	if (argc == 3 && !strcmp(argv[1], "server"))
		serve(atoi(argv[2]));
	else if (argc == 5)
		load(argv[1], argv[2], argv[3], atof(argv[4]));
	else
		return 2;
	return 0;
}
